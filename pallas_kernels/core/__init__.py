"""What every operator shares: dispatch, documents, costs, the test suite, the benchmark harness."""
