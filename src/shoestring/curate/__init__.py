"""Which traces are kept: filters, one a file, each `judge(traces)`: a reason to drop, or none, for each."""
