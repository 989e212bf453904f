"""A deployment over an open network: the server's link, what guards it, and its sites."""
