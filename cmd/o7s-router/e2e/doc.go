// Package e2e tests whole networks: the real binary in network namespaces,
// over deploy/lab, from the wire to the command line. It has tests only. They
// need root and skip without it, unless O7S_TEST_NO_SKIP=1 forbids skipping.
package e2e
