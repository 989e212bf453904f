"""The way of an update from client to server: encode, decode, validate."""
