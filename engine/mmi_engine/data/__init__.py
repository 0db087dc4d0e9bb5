"""The entry: manifest rows and images, before any of them is a token or a tensor."""
