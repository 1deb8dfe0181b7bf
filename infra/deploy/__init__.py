"""What containers are built from, and the two small programs that the compose file needs."""
