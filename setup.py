"""Builds the `packspeed` package from the top-level folders.

src/packspeed/ holds one relative link per top-level folder, so setuptools, type checkers and editors see an ordinary
src layout, and nothing called `model` or `data` lands in site-packages. `packspeed` is a namespace package.
"""

from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).resolve().parent

setup(
    name="packspeed",
    version="0.1.0",
    description="Pretrain GPTs with DeepSpeed: a run is a pure function of its run file, dataset and seed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_namespace_packages("src"),
    package_data={
        "packspeed.data": ["*.tiktoken", "*.md"],
        "packspeed.model": ["*.cpp", "*.h"],
        "packspeed.launch.configs": ["*.yaml"],
        "packspeed.launch.cluster.templates": ["*"],
        "packspeed.launch.planner": ["*.yaml"],
        "packspeed.launch.planner.machines": ["*.yaml"],
        "packspeed.ds_configs": ["*.json", "*.md"],
    },
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19.8,<0.20",
        "tiktoken>=0.7",
        "tokenizers>=0.20",
        "regex>=2023.12",
        "datasets>=3.0",
        "pyarrow>=15",
        "zstandard>=0.22",
        "numpy>=1.26",
        "orjson>=3.9",
        "tensorboard>=2.16",
        "pillow>=10.4",
        "pyyaml>=6.0",
        "hjson>=3.0",
        "pydantic>=2.7",
        "typer>=0.12",
        "rich>=13.0",
        "xxhash>=3.4",
        "fsspec>=2024.2",
        "safetensors>=0.4",
        "ninja>=1.11",
        "psutil>=5.9",
    ],
    extras_require={
        "fast": ["gigatoken>=0.10"],
        "s3": ["s3fs>=2024.2"],
        "sentencepiece": ["sentencepiece>=0.2", "protobuf>=4"],
        "gcs": ["gcsfs>=2024.2"],
        "eval": ["lm-eval>=0.4.9"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "transformers>=4.50",
            "megatron-core>=0.12",
            "gigatoken>=0.10",
            "moto[s3,server]>=5.0",
            "s3fs>=2024.2",
            "boto3>=1.34",
            "gcsfs>=2024.2",
            "gcp-storage-emulator>=2024.8",
            "scipy>=1.11",
            "sentencepiece>=0.2",
            "lm-eval>=0.4.9",
            "accelerate>=1.0",
            "triton>=3.3; sys_platform == 'linux'",  # torch's CUDA wheels bring it, CPU wheels do not
            "kubernetes-validate>=1.37",
            "uv>=0.8",  # resolves the constraints for every Python without downloading packages
        ],
        "dev": ["ruff>=0.9", "mypy>=1.14", "types-PyYAML", "types-psutil"],
    },
    entry_points={"console_scripts": ["packspeed=packspeed.launch.cli:command"]},
)
