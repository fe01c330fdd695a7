"""The main job on real input: stream from a checkpoint, beside the published path, and report what was found."""
