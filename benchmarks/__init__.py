"""Long measurements and trials that are no tests; each also runs at small N as one."""
