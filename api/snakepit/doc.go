// Package snakepit is the bridge protocol DSPex-style applications speak, wire-identical
// to snakepit v0.4.3. Only the session, variable, watch and advanced calls are typed
// here; tool calls and calls unknown to this package are forwarded byte for byte.
package snakepit
