"""Who answers: an endpoint, rules, or a journal."""
