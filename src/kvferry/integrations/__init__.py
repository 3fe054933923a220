"""Where kvferry and other projects' engines meet."""
