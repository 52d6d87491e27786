// Package e2e tests the exported face of acceptq on the real kernel: the same behavior and
// the same errors as package net, every system, load, and what an attacker can do. It has
// tests only. What a test compares with comes from the kernel, by packages under internal/.
package e2e
