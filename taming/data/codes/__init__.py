"""Codes of a tokenizer in packed files, `.tcc`: encoded once by `taming encode`, read in every epoch."""

from taming.data.codes.dataset import CodeDataset
from taming.data.codes.format import CodeCacheError, CodeHeader, Field

__all__ = ["CodeCacheError", "CodeDataset", "CodeHeader", "Field"]
