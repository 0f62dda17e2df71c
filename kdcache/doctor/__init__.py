"""What this machine has, what is broken, and what to type: `kdcache doctor`."""
