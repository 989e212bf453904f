"""Real clients on real machines: keys, and the processes of a server and of a site."""
