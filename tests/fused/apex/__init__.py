"""What megatron asks of apex, in plain torch: a stand-in for machines that have no GPU to build apex on."""
