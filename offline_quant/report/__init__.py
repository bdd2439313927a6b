"""Reports of runs and checkpoints: data, page, figures, model card."""
