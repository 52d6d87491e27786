module github.com/acceptq/acceptq/interop

go 1.26.0

replace github.com/acceptq/acceptq => ../

require (
	github.com/acceptq/acceptq v0.0.0
	github.com/cloudflare/tableflip v1.2.3
	github.com/coreos/go-systemd/v22 v22.7.0
	github.com/stretchr/testify v1.12.1
	golang.org/x/sys v0.49.0
)

require go.yaml.in/yaml/v3 v3.0.5 // indirect
