"""Conversations and what is made of them: messages, templates, data sets, loaders."""
