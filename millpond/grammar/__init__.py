"""What an answer must look like: grammars as texts, checked, and followed token by token. llguidance decides."""
