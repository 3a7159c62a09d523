"""Export: models with zeros, stored in the space their weights need.

The folder gossamer saves by default keeps the zeros, so every tool reads it and it is as large as
the dense model. An export drops them: ``bitmask`` (values and one bit a weight), ``nm`` (2:4 and
the like: values and an index each), ``csr`` (scipy's ``.npz``), and compressed-tensors'
``sparse-bitmask`` and ``sparse-24-bitmask``. Every one reads back bit for bit.
"""

from gossamer.export.layouts import FORMATS
from gossamer.export.reader import is_export, read
from gossamer.export.report import ExportReport, TensorRow
from gossamer.export.writer import write

__all__ = ["FORMATS", "ExportReport", "TensorRow", "is_export", "read", "write"]
