"""Server and clients on machines of their own: keys, the server's link and its guard, clients."""
