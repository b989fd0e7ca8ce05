// Package inference is the Open Inference Protocol v2 over gRPC, as KServe and Triton
// speak it. The sidecar routes its calls by policy and reads no tensors; the types are for
// clients, servers and tests.
package inference
