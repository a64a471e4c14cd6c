"""Recordings that visitors send, heard; and answers, spoken."""
