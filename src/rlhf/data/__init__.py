"""Rows of text and of tokens: reading, checking, rendering, tokenizing, batching."""
