//go:build race

package e2e

// raced has the binary built with the race detector when the tests are.
const raced = true
