"""Numeric building blocks: one public function per file, plain torch inside. Nothing here imports nanogspo/."""
