"""Weights from and to the authors' formats. One module per format says how names and shapes map."""
