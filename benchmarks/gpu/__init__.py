"""The benchmark of a GPU: ``bash benchmarks/run_on_gpu.sh``; docs/gpu.md says what it measures."""
