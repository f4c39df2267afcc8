"""The lessons are the Markdown files; exercises/ holds what the reader writes. Start at README.md."""
