"""Our solutions, file by file. Look after you have tried."""
