"""Type names for parsed YAML and JSON, whose values have no static type."""

from __future__ import annotations

from typing import Any

JsonObject = dict[str, Any]  # an object of YAML or JSON
DsConfig = dict[str, Any]  # a DeepSpeed configuration, as DeepSpeed's own JSON
