"""From serve.yaml to replicas behind HAProxy: configuration, rollouts, start and end."""
