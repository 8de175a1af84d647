"""Settings of XTuner-RLHF as a layer below the command line."""
