"""What every exported head carries and how it is checked: golden batch, custom_generate."""
