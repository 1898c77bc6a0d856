"""From text and chats to training rows."""
