"""The door of `mmi`: parses, shows, exits. No tensors and no heavy import at module level."""
