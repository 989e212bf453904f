"""Server and clients on machines of their own."""
