"""What the programs share: command lines, run directories, atomic file writes, stops by signals, figures."""
