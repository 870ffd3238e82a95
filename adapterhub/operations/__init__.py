"""What the commands do, one module for each verb, whatever the place: a folder, the registry or a remote."""
