"""The roles on the teacher's network, its blocks, and ways to hold it in less memory."""
