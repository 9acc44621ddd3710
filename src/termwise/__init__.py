"""termwise: number formats for large language models and the accelerators that compute with them."""

__version__ = "0.1.0"
