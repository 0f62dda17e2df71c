"""What the `kdcache` command can do. Each parses, calls one function, prints; heavy imports inside."""
