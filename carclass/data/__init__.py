"""Photos and datasets on storage."""
