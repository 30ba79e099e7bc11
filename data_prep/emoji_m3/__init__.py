"""Emoji-M3: pictures, names and speech of emoji, built from ordinary packages.

Read settings.py (what is built), plan.py (which sample is what), then build.py (how the shards are made).
"""
