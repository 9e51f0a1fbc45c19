"""The frozen encoder behind HTTP: protocol, codecs, predictor, deployment and client."""
