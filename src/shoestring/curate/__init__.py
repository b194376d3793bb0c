"""Which traces are kept: filters, one a file, each `keep(traces) -> list[Trace]`."""
