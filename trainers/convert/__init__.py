"""Bundles from and for other libraries: the papers' own code, timm, Hugging Face transformers."""

from __future__ import annotations

from mimray.trainers.convert.importing import Imported, import_weights
from mimray.trainers.convert.to_onnx import export_onnx
from mimray.trainers.convert.to_timm import export_timm
from mimray.trainers.convert.to_transformers import export_transformers

__all__ = ["Imported", "export_onnx", "export_timm", "export_transformers", "import_weights"]
