"""`gem-st serve`: one process that chats and embeds from one copy of the weights. It needs the extra `serve`."""
