#!/bin/bash
# ninja 1.11.1.4 and 1.13.0 (PyPI): two versions that take turns in one build folder rebuild everything each time.
#
# Guess:    Whether an object is up to date depends on its inputs and its command, so another ninja finds "no work to do".
# Instead:  The newer version discards the older one's log of commands ("# ninja log v5"); the older one accepts the newer
#           log (v7), but finds other hashes of the commands in it. Both then count every command as changed. torch's
#           cpp_extension runs the first ninja on PATH, so a process in an activated environment and one outside it compile
#           the same DeepSpeed op for minutes at each start, in turn, although nothing has changed.
# Output:   1.11: built, 1.11: up to date, 1.13: built, 1.13: up to date, 1.11: built, 1.13: built
. "$(dirname "$0")/venv.sh"
venv ninja==1.11.1.4
old=${python%/*}/ninja
cp "$old" "$scratch/1.11"
rm -rf "$scratch/venv"
venv ninja==1.13.0
cp "${python%/*}/ninja" "$scratch/1.13"
cd "$scratch"
# shellcheck disable=SC2016  # $out is ninja's
printf 'rule cc\n  command = touch $out\nbuild out: cc in\n' >build.ninja
touch in
sleep 0.1
seen=
for version in 1.11 1.11 1.13 1.13 1.11 1.13; do
    if "./$version" 2>&1 | grep -q "no work to do"; then word="up to date"; else word=built; fi
    seen+="${seen:+, }$version: $word"
done
echo "$seen"
[ "$seen" = "1.11: built, 1.11: up to date, 1.13: built, 1.13: up to date, 1.11: built, 1.13: built" ]
