"""Drop-ins for other people's models and servers, one file per family; nothing here is imported by
``import rf_kernels``."""
