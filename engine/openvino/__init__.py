"""Components on OpenVINO."""
