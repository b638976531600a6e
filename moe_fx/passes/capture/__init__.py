"""CAPTURE: make data-dependent expert loops traceable, only while Dynamo compiles for us, the model untouched."""
