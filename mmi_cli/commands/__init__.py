"""One file per command: options → one engine call → exit code."""
